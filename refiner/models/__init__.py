"""Encoders: what they are made of, loading, saving and converting them."""
