"""Small programs that show what the library is for; each runs on a CPU within a minute or so."""
