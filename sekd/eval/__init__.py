"""How good is a student?"""
