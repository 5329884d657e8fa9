# SPDX-License-Identifier: Apache-2.0
"""A small FLUX-class transformer trained on handwritten digits: real weights to calibrate and judge with."""
