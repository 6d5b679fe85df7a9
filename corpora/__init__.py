"""Where pairs come from: skip it unless you bring a new layout of lines, or a new corpus."""
