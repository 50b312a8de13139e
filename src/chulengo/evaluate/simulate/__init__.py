"""A client and an agent talk: scenarios or held-out dialogues in, transcripts and scores out."""
