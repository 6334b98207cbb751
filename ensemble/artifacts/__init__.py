"""Files that leave: saved forwards, and N models as one program for other runtimes. No torch here."""
