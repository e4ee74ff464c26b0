"""What is done with predictions after a training: verbs that read prediction files and a data set, and no model."""
