# SPDX-License-Identifier: LGPL-2.1-or-later
"""The version, in the one place that states it; it imports nothing, so that reading it costs nothing."""

VERSION = "0.2.0"
