/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* hash.h - where a five-tuple may lie in the flow table. Twin: xdp/hash.py. */
#pragma once

/* A five-tuple as it lies in memory: both addresses, both ports (network byte order, source in the lower half). */
struct tuple {
	__u64 addrs;
	__u32 ports;
	__u32 protocol;
};

/* A keyed multiply-xor hash on 64-bit words: two multiplications in parallel, one behind them. The odd constants are
 * fractional digits of the golden ratio and of the square roots of 2 and 3; the key is secret, so nobody outside can
 * aim at a bucket. */
static inline __u64 hash_tuple(const struct tuple *tuple, __u64 key0, __u64 key1)
{
	__u64 a = (tuple->addrs ^ key0) * 0x9e3779b97f4a7c15ULL;
	__u64 b = (((__u64)tuple->protocol << 32 | tuple->ports) ^ key1) * 0x6a09e667f3bcc909ULL;
	__u64 hash = a ^ (b >> 32 | b << 32);

	hash ^= hash >> 29;
	hash *= 0xbb67ae8584caa73bULL;
	return hash ^ hash >> 32;
}

/* The two buckets that a hash may lie in, of `buckets`; they may be the same one. */
static inline __u32 first_bucket(__u64 hash, __u32 buckets)
{
	return (hash & 0xffffffff) * buckets >> 32;
}

static inline __u32 second_bucket(__u64 hash, __u32 buckets)
{
	return (hash * 0x9e3779b97f4a7c15ULL >> 32) * buckets >> 32;
}

/* The tag of a hash: never a reserved value. */
static inline __u64 tag_of(__u64 hash)
{
	__u64 tag = hash >> 48;

	return tag < TAG_FIRST ? tag + TAG_FIRST : tag;
}

/* The top bit of each 16-bit lane of `word` that equals `tag`; exact, without carries between lanes. */
static inline __u64 lanes_equal(__u64 word, __u64 tag)
{
	const __u64 low = 0x7fff7fff7fff7fffULL;
	__u64 x = word ^ tag * 0x0001000100010001ULL;

	return ~(((x & low) + low) | x | low);
}

/* Which tags of a bucket equal `tag`: bit 16 i + w is tag i of word w, so that one number holds all sixteen. */
static inline __u64 hits_of(const struct bucket *bucket, __u64 tag)
{
	return lanes_equal(bucket->word[0], tag) >> 15 | lanes_equal(bucket->word[1], tag) >> 14 |
	       lanes_equal(bucket->word[2], tag) >> 13 | lanes_equal(bucket->word[3], tag) >> 12;
}

/* The number within its bucket (4 w + i) of a tag whose bit is set in `hits`; at least one is. BPF cannot count zeros. */
static inline __u32 lowest_hit(__u64 hits)
{
	__u64 hit = hits & -hits;
	__u32 number = 0;

	if (hit & 0xffff0000ffff0000ULL)  /* i is odd */
		number += 1;
	if (hit & 0xffffffff00000000ULL)  /* i is 2 or 3 */
		number += 2;
	if (hit & 0x000a000a000a000aULL)  /* w is odd */
		number += 4;
	if (hit & 0x000c000c000c000cULL)  /* w is 2 or 3 */
		number += 8;
	return number;
}
