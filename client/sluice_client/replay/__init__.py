"""Captured requests sent again, at their times, and what is different about the answers: `sluice replay`."""
