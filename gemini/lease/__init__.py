"""Memory that the runs of one machine share: what it has, which run holds what of it, and who gets how much.

Nothing here imports torch: ``gemini-stat lease`` shows the same as what runs follow.
"""
