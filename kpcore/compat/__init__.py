"""Other libraries' functions under their own names and argument orders, computed by kpcore."""
