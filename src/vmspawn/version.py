# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the version, and imports nothing, so that reading it is cheap."""

VERSION = "0.2.0"
