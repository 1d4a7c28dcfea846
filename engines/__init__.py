"""The engines that run a search, with NNI or without it, and the record that both write."""
