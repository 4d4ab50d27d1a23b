"""Probing and comparing whole models under the protocols of the paper."""
