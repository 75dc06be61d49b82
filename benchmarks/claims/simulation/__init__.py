"""A serving engine without a model: request lengths, KV allocators, and what memory and time they cost."""
