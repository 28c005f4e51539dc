"""Graph passes: any way to write cached attention becomes attention over a pruned cache."""
