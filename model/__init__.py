"""Images, features, encoder, ranker, evaluation and their registry; knows nothing of Beam."""
