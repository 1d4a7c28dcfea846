"""The images: which ones, in which order, whether they can be read, and how they are kept once decoded."""
