/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bare.c - the bar for program cost: exchanges the MAC addresses and sends the frame back. */
#include "back.h"

int bare(struct xdp_md *ctx)
{
	return sent_back(ctx);
}
