"""The matrix: one short training for each selected combination of model, policy, tier, precision and so on."""
