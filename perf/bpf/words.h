/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* words.h - the u64 words through which the programs here are told what to do and tell what they saw. Read by clang and
 * by cffi (perf/traffic.py), like xdp/bpf/schema.h. */
#pragma once

/* What the generator sends. Addresses and ports as plain numbers, MACs as the frame's bytes in the low end. */
enum order {
	ORDER_NEXT,        /* flow of the next frame: grows by one per frame ... */
	ORDER_FLOWS,       /* ... and begins again here; 0: never, every frame is a flow of its own */
	ORDER_DST_MAC,
	ORDER_SRC_MAC,
	ORDER_SRC_ADDR,    /* flow f comes from SRC_ADDR + f / SOURCE_PORTS */
	ORDER_DST_ADDR,
	ORDER_DST_PORT,
	ORDER_IFINDEX,     /* where the frames are transmitted */
	ORDERS,
};

/* What the sink saw, one row of words per CPU. */
enum seen {
	SEEN_PACKETS,      /* UDP packets of the generator */
	SEEN_TRANSLATED,   /* of those, packets to an endpoint's port */
	SEEN_WRONG,        /* of those, packets whose IPv4 or UDP checksum is wrong: counted by TASK_VERIFY only */
	SEENS = 8,         /* a row is a cache line */
};

/* What the sink does with a packet beside counting it. In a map of its own: it is read on every CPU, written hardly ever. */
enum sink_task {
	TASK_DROP,
	TASK_VERIFY,       /* check its checksums, then drop it */
	TASK_REFLECT,      /* send it back to where it came from: a reply */
};

enum traffic {
	FIRST_SOURCE_PORT = 1024,
	SOURCE_PORTS = 32768,
	FRAME_BYTES = 60,  /* 64 with the frame check sequence */
};
