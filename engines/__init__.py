"""The engines that run a search, with NNI or on this machine alone, and the record that both write."""
