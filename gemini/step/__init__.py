"""What a boosted optimizer is to its user: the step, the loss scale, and saved states."""
