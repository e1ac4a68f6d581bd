"""One trainer for every stage: state and step, checkpoints, metrics, the loop; tasks say what is trained on what."""
