# SPDX-License-Identifier: Apache-2.0
"""A small Qwen-Image-class transformer trained on the digits of ``calib.digits_flux``: a model of another class."""
