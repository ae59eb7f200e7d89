"""The status view: what it draws, what keys do, and how it treats the terminal."""
