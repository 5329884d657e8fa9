# SPDX-License-Identifier: Apache-2.0
"""What each op means, one file an op: its definition in torch and how its weights are packed."""
