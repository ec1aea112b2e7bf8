"""``gemini-stat``: looks at runs by reading the files that they write. Never imports torch."""
