"""What report.py needs: the results of a search in numbers, and their figures."""
