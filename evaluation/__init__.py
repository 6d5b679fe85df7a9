"""How good embeddings are, and exact search among them. Skip it unless you change what is
measured."""
