# SPDX-License-Identifier: Apache-2.0
"""Shows, for every transformer class of the installed diffusers, how far it goes: ``make support``."""
