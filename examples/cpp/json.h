// The little of JSON that an exported folder needs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  std::map<std::string, Json> members;  // of an object
  std::vector<Json> items;              // of an array
  std::string text;                     // of anything else: a string, or as it was written

  const Json& at(const std::string& name) const {
    const auto found = members.find(name);
    if (found == members.end()) throw std::runtime_error("the JSON has no " + name);
    return found->second;
  }
  int64_t number() const { return std::strtoll(text.c_str(), nullptr, 10); }
  std::vector<int64_t> numbers() const {
    std::vector<int64_t> all;
    for (const Json& item : items) all.push_back(item.number());
    return all;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& source) : source_(source) {}

  Json read() {
    Json value;
    switch (peek()) {
      case '{':
        ++at_;
        while (peek() != '}') {
          const std::string name = string();
          expect(':');
          value.members[name] = read();
          if (peek() != '}') expect(',');
        }
        ++at_;
        break;
      case '[':
        ++at_;
        while (peek() != ']') {
          value.items.push_back(read());
          if (peek() != ']') expect(',');
        }
        ++at_;
        break;
      case '"': value.text = string(); break;
      default:  // a number, true, false or null
        while (at_ < source_.size() && !std::strchr(",]} \n\r\t", source_[at_])) value.text += source_[at_++];
    }
    return value;
  }

 private:
  char peek() {
    while (at_ < source_.size() && std::strchr(" \n\r\t", source_[at_])) ++at_;
    if (at_ == source_.size()) throw std::runtime_error("the JSON ends too early");
    return source_[at_];
  }
  void expect(char wanted) {
    if (peek() != wanted) throw std::runtime_error(std::string("the JSON has no ") + wanted + " where there must be one");
    ++at_;
  }
  std::string string() {  // names of tensors and files have no \u in them
    expect('"');
    std::string text;
    for (; at_ < source_.size() && source_[at_] != '"'; ++at_) {
      if (source_[at_] == '\\') ++at_;
      if (at_ < source_.size()) text += source_[at_];
    }
    expect('"');
    return text;
  }

  const std::string& source_;
  size_t at_ = 0;
};
