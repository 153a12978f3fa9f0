"""TriQDef in JAX: train one backbone under several bit-widths, attack it with patches, ship one bit-width in integers."""
