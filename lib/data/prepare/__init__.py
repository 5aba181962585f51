"""Other people's layouts of pictures and captions -> the layout that training reads."""
