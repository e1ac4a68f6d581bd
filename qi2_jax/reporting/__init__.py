"""The page of `qi2 report`: curves of metrics files, charts, and which of them stand where."""
