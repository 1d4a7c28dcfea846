"""Files of weights, ours and official."""
