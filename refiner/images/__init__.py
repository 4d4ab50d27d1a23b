"""Images: sets, folders, streams, Toybox, views and corruptions."""
