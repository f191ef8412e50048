"""A hybrid model that sleeps: settings, spans of text, Algorithm 1, the model itself, sessions."""
