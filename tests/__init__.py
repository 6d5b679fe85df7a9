"""All tests but those of the losses and the batches, which lie beside what they test."""
