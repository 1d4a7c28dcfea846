"""The images: which are used, in which order, whether they can be read, and how decoded ones are cached."""

import settings  # noqa: F401 (says which file of a program stands in the way)
