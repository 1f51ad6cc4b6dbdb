"""The contract with the Linux kernel: schema, BPF programs, loader, maps as arrays."""
