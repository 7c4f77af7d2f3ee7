"""A trace: requests as columns, prompts as chained block ids."""
