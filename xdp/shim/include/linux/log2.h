/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bcc includes this for its histograms, which an XDP program has no use for. */
#pragma once
