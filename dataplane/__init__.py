"""Putting it together: frames, pipeline, sockets, netlink, workers, the node and its command line."""
