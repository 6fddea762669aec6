"""What labeling tools write, read into images and masks of one form: a module for each tool."""
