"""The images: which are used, in which order, whether they can be read, and how decoded ones are cached."""
