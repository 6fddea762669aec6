"""Label sets, folder layouts, generated scenes, index and loading of labeled images."""
