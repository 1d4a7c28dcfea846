"""Reports on results: a search in numbers and figures, and the latency of its networks on a device."""
