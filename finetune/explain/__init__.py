"""What an answer rests on: modalities (Shapley values), patches and words (relevance)."""
