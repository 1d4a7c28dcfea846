"""The engines that run a search, by NNI or on this machine alone, and the record that both keep."""
