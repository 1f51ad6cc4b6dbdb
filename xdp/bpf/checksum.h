/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* checksum.h - incremental one's complement checksums, RFC 1624 equation 3. Twin: dataplane/wire.py. */
#pragma once

static inline __u32 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The same of a sum of words twice as long: that of their halves. */
static inline __u32 fold_words(__u64 sum)
{
	return fold(fold((__u32)(sum & 0xffff) + (__u32)(sum >> 16 & 0xffff) + (__u32)(sum >> 32)));
}

/* The checksum after the covered words grew by `delta`. A wrong checksum stays wrong. */
static inline __u16 checksum_add(__u16 check, __u16 delta)
{
	return ~fold((__u16)~check + (__u32)delta);
}
