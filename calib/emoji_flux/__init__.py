# SPDX-License-Identifier: Apache-2.0
"""FLUX-class transformers trained to draw colour emoji of their names: pictures worth looking at."""
