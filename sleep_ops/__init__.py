"""Sleep for language models: looped consolidation of fast weights."""
